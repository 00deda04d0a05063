package policy

import (
	"strings"

	"github.com/meshca/meshca/api/refusal"
)

// Input is who asks. The names are checked again here: an ID is only as sound as what is put into it. The rest is what
// conditions can ask about, and is needed only where one does.
type Input struct {
	Cluster, Namespace, ServiceAccount string
	// Pod and Node are the names of the pod and of its node; empty: not known.
	Pod, Node string
	// PodLabels, PodAnnotations and NamespaceLabels are nil where they are not known; an object that has none has an
	// empty map. They must not change while a decision is made.
	PodLabels, PodAnnotations, NamespaceLabels map[string]string
	// TooLarge are those of them that are not known because they are larger than anyone may have them (see MaxEntries).
	TooLarge Facts
}

// Facts is a set of what conditions can ask about beside the names of cluster, namespace and service account.
type Facts uint8

// The facts, as conditions ask for them: pod.name and so on.
const (
	PodName Facts = 1 << iota
	PodLabels
	PodAnnotations
	NamespaceLabels
	NodeName

	// ofObjects are those that no token tells: only the cluster's API server knows them.
	ofObjects = PodLabels | PodAnnotations | NamespaceLabels
)

// Bounds of labels and of annotations, for whoever gathers them: an object that has more is TooLarge. They are far above
// what people write; Kubernetes allows 256 KiB of annotations.
const (
	MaxEntries    = 256
	MaxEntryBytes = 16 << 10 // of all keys and values of one map
)

// String lists the facts as conditions name them.
func (f Facts) String() string {
	var names []string
	for _, v := range variables {
		if v.fact&f != 0 {
			names = append(names, v.name)
		}
	}
	return strings.Join(names, ", ")
}

// unknown are the facts that are not there.
func (in *Input) unknown() Facts {
	var f Facts
	for _, v := range [...]struct {
		known bool
		fact  Facts
	}{
		{in.Pod != "", PodName}, {in.Node != "", NodeName},
		{in.PodLabels != nil, PodLabels}, {in.PodAnnotations != nil, PodAnnotations}, {in.NamespaceLabels != nil, NamespaceLabels},
	} {
		if !v.known {
			f |= v.fact
		}
	}
	return f
}

// check refuses what is no Kubernetes name: a slash or a dot segment in it would change the shape of the ID.
func (in *Input) check() error {
	switch {
	case !isName(in.Cluster, 63):
		return refusal.New(refusal.IdentityInvalid, "cluster %q is not a name of 1 to 63 lower-case letters, digits, - and .", clip(in.Cluster))
	case !isName(in.Namespace, 63):
		return refusal.New(refusal.IdentityInvalid, "namespace %q is not a name of 1 to 63 lower-case letters, digits, - and .", clip(in.Namespace))
	case !isName(in.ServiceAccount, 253):
		return refusal.New(refusal.IdentityInvalid, "service account %q is not a name of 1 to 253 lower-case letters, digits, - and .", clip(in.ServiceAccount))
	}
	return nil
}

// isName is RFC 1123's subdomain as Kubernetes has it, with the bound given; it holds no empty or dot-only part.
func isName(s string, most int) bool {
	if len(s) == 0 || len(s) > most {
		return false
	}
	border := true // at the beginning of a label, where neither - nor . may stand
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			border = false
		case c == '-':
			if border || i == len(s)-1 || s[i+1] == '.' {
				return false
			}
		case c == '.':
			if border {
				return false
			}
			border = true
		default:
			return false
		}
	}
	return !border
}

// clip bounds what a message repeats of a stranger's input.
func clip(s string) string {
	if len(s) > 80 {
		return s[:77] + "..."
	}
	return s
}
