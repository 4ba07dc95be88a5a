"""Plots of numbers as SVG: losses, the range test, curves over steps, histograms."""
