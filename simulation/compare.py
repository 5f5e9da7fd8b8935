"""Is federated better than alone? The same network, images, splits and steps, without Flower."""
