"""The wire protocol's Python side: frames, messages, channels, and the launcher at the other end of one.

The format is written down in docs/design/protocol.md.
"""
