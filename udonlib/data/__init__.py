"""What is learned from: catalogs of images, and how images are read, decoded and augmented."""
