"""Models, their sites, and what is put into them."""
