"""Building engines that are called without a server; `inplace_builder.api` is the way in."""
