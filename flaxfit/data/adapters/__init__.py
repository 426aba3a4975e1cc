"""An adapter for each kind of dataset, and the registry of all kinds."""
