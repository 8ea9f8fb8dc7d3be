"""Sparse autoencoders: the module, its kinds, the spliced model, pruning."""
