"""Engines that a server loads: build, plan, write and verify."""
