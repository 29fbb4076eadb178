"""The storage classes of S3 that a pack may lie in (AWS S3 User Guide, "Understanding storage classes")."""

ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")
"""those that have to be thawed before they are read"""
AT_ONCE = ("STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR")
"""cheaper ones that are read like any other"""
