"""``python -m memlayer_cli``, which launchers of several processes can start."""

from memlayer_cli.main import main

if __name__ == "__main__":
    main()
