"""`python -m igpt_ray <command>` is `igpt <command>`."""

from igpt_ray.cli import main

if __name__ == "__main__":
    main()
