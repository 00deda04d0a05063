package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// reap is what process 1 is for. The node's programs are not its children: it would have to tell theirs from the shims
// and containers that lost their parents.
func reap() error {
	if err := delegate(); err != nil {
		return err
	}
	keeper := exec.Command("/proc/self/exe", "keep")
	keeper.Stdout, keeper.Stderr = os.Stdout, os.Stderr
	keeper.ExtraFiles = []*os.File{os.NewFile(doorFD, "door")}
	if err := keeper.Start(); err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if pid == keeper.Process.Pid {
			return fmt.Errorf("the keeper of its programs ended (%d)", status)
		}
	}
}
