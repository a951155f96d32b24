"""The three boundaries, behind one seam (`levels.base`). Process, container and vm know nothing of each other, but that
a VM's VMM is started in a sandbox of the container level.
"""
