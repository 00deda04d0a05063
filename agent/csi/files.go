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
	// Keep has the workload's files in dir, the volume's directory on the node, which the pod sees read-only, and has them
	// follow what the workload has, until ctx ends. They belong to gid, the pod's fsGroup; nil: it has none. It reports
	// why they cannot be written, and nil when they are there for the first time, and then no more. When it returns before
	// ctx ends it is called again after a while. The socket lies in the same directory, and is not the writer's.
	Keep(ctx context.Context, k *agent.Kept, dir string, gid *int, options map[string]string, report func(error)) error
}
