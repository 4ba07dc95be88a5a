"""Numbers to SVG and HTML: sublines, loss and range-test plots, the report."""
