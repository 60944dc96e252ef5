"""Heads of AVS and AVQA: the fast way through them, and their losses."""
