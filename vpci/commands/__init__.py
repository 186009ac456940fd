"""What each command does: cli.py parses and calls run(args) of the module that has the command's name."""
