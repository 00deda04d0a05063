package csi

import (
	"context"

	"github.com/meshca/meshca/agent"
)

// Writer makes files of what a workload has, for volumes that ask for them. Its methods are safe for concurrent use.
type Writer interface {
	// Attributes are the names of the volume attributes that are the writer's. A volume that has one asks for files.
	Attributes() []string
	// Check says what is wrong with the volume's attributes; options holds the writer's alone.
	Check(options map[string]string) error
	// Keep has the workload's files in the directory, and has them follow what the workload has, until ctx ends. It calls
	// written when they are there for the first time. When it returns before ctx ends it is called again after a while.
	// The socket lies in the same directory, and is not the writer's.
	Keep(ctx context.Context, k *agent.Kept, files Files, written func()) error
}

// Files is where and how a volume wants files.
type Files struct {
	// Dir is the volume's directory on the node; the pod sees it read-only.
	Dir string
	// GID is the pod's fsGroup, to which files belong; nil where it has none.
	GID *int
	// Options are the volume's attributes that are the writer's.
	Options map[string]string
}
