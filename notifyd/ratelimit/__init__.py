"""How often callers may call, clients connect, and connections speak: token buckets."""
