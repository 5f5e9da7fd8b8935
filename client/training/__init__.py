"""Local training rounds and evaluation at one site."""
