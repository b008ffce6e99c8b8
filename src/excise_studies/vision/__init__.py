"""Gradient routing on images: an encoding in two halves, one for each group of classes."""
