"""The offline zoo: a real base and real experts from files inside package archives (docs/zoo.md)."""
