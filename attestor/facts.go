package attestor

// Bounds of the labels, and of the annotations, that are gathered of one object: one that has more has none for us, and
// is TooLarge.
const (
	MaxEntries    = 256
	MaxEntryBytes = 16 << 10 // of all keys and values
)

// Wants says which labels and annotations are gathered beside an identity. What nobody wants is not kept, and costs
// nothing.
type Wants struct{ PodLabels, PodAnnotations, NamespaceLabels bool }

// Facts are labels and annotations as they were at an attestation. Whoever may change a pod may change them, so they are
// worth as much as that person is trusted. A map is nil where it was not wanted or is too large, and empty where the
// object has none; it must not be changed.
type Facts struct {
	PodLabels, PodAnnotations, NamespaceLabels map[string]string
	// TooLarge are those that were wanted and are larger than is gathered.
	TooLarge Wants
}

// PodRef names a pod that an agent vouches for: by all three, or by its UID alone, which is what the agent of a node can find
// out about a process. Node is the name of the agent's node: pods of others are not looked for.
type PodRef struct{ Namespace, Name, UID, Node string }
