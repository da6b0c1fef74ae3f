"""The `jaxherd` command: one file a verb."""
