"""From a base and an adapter to a model that ships."""
