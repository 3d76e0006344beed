"""Rows: the schema every data set has, the built-in phantom, masks, and readers of image folders."""
