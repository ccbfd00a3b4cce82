"""The training recipes that come with the package, one YAML file a purpose. Knows where they lie, not what they mean."""
