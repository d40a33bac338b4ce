"""Building engines that are called without a server; `inplace_builder.standalone.build` is the way in."""
