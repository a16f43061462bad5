"""Quantised weights as other programs store them, read into fiddler's packed experts.

``scheme`` reads what ``config.json`` says, the layouts (``int_words``, ``fp8``, ``mxfp4``) turn
rows of one matrix into codes, and ``source`` reads a whole checkpoint. No layout imports torch.
"""
