// Command certctl asks and orders: the CA and the agents, through their admin sockets.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"
)

// version is set by the linker.
var version = "dev"

func main() { os.Exit(execute()) }

func execute() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process wherever it stands
	c := &cli{in: os.Stdin, out: os.Stdout, err: os.Stderr, now: time.Now, asking: term.IsTerminal(int(os.Stdin.Fd()))}
	if out := int(os.Stdout.Fd()); term.IsTerminal(out) {
		c.colour, c.size = true, func() (int, int, error) { return term.GetSize(out) }
	}
	return c.run(ctx, os.Args[1:])
}
