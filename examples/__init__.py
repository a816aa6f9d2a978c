"""Programs that use Lensor: the demo and the gallery of diagrams. Run them from the root of the repository."""
