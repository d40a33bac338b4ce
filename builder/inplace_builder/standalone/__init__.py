"""Engines that are called without a server: build, plan, write and verify."""
