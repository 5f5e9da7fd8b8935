"""Operating a coordinator: certificates, registry, processes, backup."""
