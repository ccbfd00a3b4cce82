"""The decoding engine: many requests in one batch, each picture and each token computed once."""
