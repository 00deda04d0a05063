package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// read reads a file, or the standard input for "-", of at most most bytes. what it is stands in errors. It waits no
// longer than ctx for a pipe that nobody writes to, or a file system that does not answer: such a call cannot be ended,
// so it is left to itself, and ends with the process.
func (c *cli) read(ctx context.Context, what, path string, most int64) ([]byte, error) {
	type outcome struct {
		data []byte
		err  error
	}
	done := make(chan outcome, 1)
	go func() {
		data, err := c.readAll(path, most)
		done <- outcome{data, err}
	}()
	select {
	case o := <-done:
		if o.err != nil {
			return nil, no("cannot read "+what, o.err, "")
		}
		return o.data, nil
	case <-ctx.Done():
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, interrupted
	}
	if path == "-" {
		path = "the standard input"
	}
	return nil, &failure{code: exitUnreachable, what: "cannot read " + what, why: path + " did not come to its end in time", next: "Try a longer --timeout"}
}

func (c *cli) readAll(path string, most int64) ([]byte, error) {
	in := c.in
	if path != "-" {
		// Before it is opened: to open a device may do something. A pipe is what `<(command)` makes of a command.
		if info, err := os.Stat(path); err == nil && info.Mode().Type()&^fs.ModeNamedPipe != 0 {
			return nil, fmt.Errorf("%s is neither a file nor a pipe", path)
		}
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s has more than %d bytes", path, most)
	}
	return b, nil
}
