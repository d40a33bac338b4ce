"""Tools of the command line: tritonserver, chat, tables that describe an engine."""
