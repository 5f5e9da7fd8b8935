"""Load a site's data: manifest, images, splits and augmentation."""
