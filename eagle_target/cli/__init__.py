"""The `eagle-target` command. Its modules import no torch until a command runs."""
