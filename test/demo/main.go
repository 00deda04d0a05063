// Command demo is what `make run` shows: `meshca dev`, two real Envoys that get their identities from it over SDS, and
// a steady stream of requests from one to the other, each with a handshake of its own, while the identities rotate.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"
)

// Where the CA's root can be.
const (
	upstreamDisk  = "disk"
	upstreamVault = "vault"
)

// options are the flags.
type options struct {
	meshca   string
	upstream string
	ttl      time.Duration
	runFor   time.Duration
	rate     int
	state    string
}

func main() {
	var o options
	flag.StringVar(&o.meshca, "meshca", "bin/meshca", "the meshca binary")
	flag.StringVar(&o.upstream, "upstream", upstreamDisk, "where the CA's root is: disk, or vault, which starts a Vault")
	flag.DurationVar(&o.ttl, "svid-ttl", time.Minute, "life of the SVIDs; meshca's own default is six hours")
	flag.DurationVar(&o.runFor, "run-for", 0, "end after so much traffic (0: at Ctrl-C)")
	flag.IntVar(&o.rate, "rate", 50, "requests a second")
	flag.StringVar(&o.state, "state", "", "directory for what the demo keeps (default: a temporary one, removed at the end)")
	flag.Parse()
	if err := o.check(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the demo at once, and the kernel ends its children
	r, err := demo(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
	}
	r.print(os.Stdout) // whatever happened: its last line is for programs
	if err != nil || len(r.faults()) > 0 {
		os.Exit(1)
	}
}

func (o options) check(rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("%q is no flag: UPSTREAM, SVID_TTL, RUN_FOR and RATE are what `make run` takes", rest[0])
	case o.upstream != upstreamDisk && o.upstream != upstreamVault:
		return fmt.Errorf("the upstream %q: it is disk or vault", o.upstream)
	case o.ttl < 10*time.Second || o.ttl > 6*time.Hour:
		return fmt.Errorf("SVIDs of %s: 10s to 6h makes sense here", o.ttl)
	case o.rate < 1 || o.rate > 1000:
		return fmt.Errorf("%d requests a second: 1 to 1000 makes sense here", o.rate)
	case o.runFor < 0:
		return errors.New("a negative run time: 60s runs for a minute, 0 until Ctrl-C")
	}
	return nil
}

// demo runs until ctx ends or the time is up, and stops everything that it started. The result counts also beside an
// error.
func demo(ctx context.Context, o options) (result, error) {
	s, err := setUp(ctx, o)
	if err != nil {
		return result{ttl: o.ttl, cut: true}, err
	}
	defer s.tearDown()
	var d display = &lines{w: os.Stdout, every: 5 * time.Second}
	if term.IsTerminal(int(os.Stdout.Fd())) {
		d = newScreen(os.Stdout, func() (int, int, error) { return term.GetSize(int(os.Stdout.Fd())) })
	}
	defer d.close()
	return s.play(ctx, o, d)
}
