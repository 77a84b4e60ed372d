"""poemerge: model merging as MAP inference under a product of experts."""
