// Inside is the first process of a node's namespaces: it makes them look like a machine of their own, runs the node's
// programs, and all of them die with it. Package node starts it; it is of no use to people.
//
// It becomes, one after the other,
//
//	namespaces  joins the node's cgroups and arranges the mounts; then it runs itself again, in a cgroup namespace
//	init        process 1: starts the programs' keeper, and takes leave of processes that nobody else waits for
//	keep        runs the node's programs, and does what package node asks for
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// Where things are inside. dir and bin are the two folders that the node shares with who started it.
const (
	dir = "/run/node"
	bin = "/run/parts"
	// doorFD is a listener of the world outside: what connects there is led to the API server.
	doorFD = 3
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if os.Getpid() != 1 && (len(args) == 0 || args[0] != "keep") {
		return fmt.Errorf("%s is started by package test/node, in namespaces of its own", filepath.Base(os.Args[0]))
	}
	switch {
	case len(args) == 3 && args[0] == "namespaces":
		return arrange(args[1], args[2])
	case len(args) == 1 && args[0] == "init":
		return reap()
	case len(args) == 1 && args[0] == "keep":
		return keep()
	}
	return fmt.Errorf("unknown arguments %q", args)
}
