"""`python -m srft_prep` is the same program as `srft-prep`."""

from srft_prep.cli import main

if __name__ == "__main__":
    main()
