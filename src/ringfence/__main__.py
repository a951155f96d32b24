"""`python -m ringfence`: the same as the command `ringfence`."""

from ringfence.cli import leave, main

if __name__ == "__main__":
    leave(main())
