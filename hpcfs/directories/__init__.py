"""Directory listings: for programs that read them, ahead of walks, and as answers to lookups.

Owns open directories, the listings of the last second, and the prediction of a walk's next steps.
Must not know open files, uploads or the cache's files: a function that it is given makes nodes.
Begin with `directories` (readdir) and `lister`; `walk_predictor` and `lookup_rate` are pure.
"""
