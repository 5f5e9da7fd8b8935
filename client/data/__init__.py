"""From a hospital's files to arrays: manifest, images, splits, augmentation."""
