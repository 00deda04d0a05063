// Tenant is a container of a pod that has an identity, and prints what it sees, one JSON object a line. Where it prints
// a fault that it must not meet, it ends with exit code 1.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

const usage = `usage: tenant COMMAND
  idle                   says that it started, and waits for SIGTERM
  first SOCKET           wants its identity at the first try; then as idle
  watch SOCKET           as first, then says what it is served and when its stream ends, and comes back, until SIGTERM
  read DIR               wants whole files of an identity, kubernetes.io/tls; then as idle
  raid SOCKET ID CLUSTER CA AGENT TOKEN PATH…
                         tries to get what is another pod's: an identity, at the socket and, with its token, from the CA;
                         paths of the node's; what the installation's pods answer, at the addresses CA and AGENT
  thief CLUSTER CA DIR   shows the CA what DIR has of a node's agent and of pods, says how each try ended; then as idle`

// Line is what is printed.
type Line struct {
	At time.Time `json:"at"`
	// What is started, secret, closed, files, success, raided, tried, done or fault.
	What   string `json:"what"`
	ID     string `json:"id,omitempty"`
	Serial string `json:"serial,omitempty"`
	Roots  int    `json:"roots,omitempty"`
	Text   string `json:"text,omitempty"`
}

// printer prints lines, one at a time.
type printer struct{ mu sync.Mutex }

func (p *printer) say(l Line) {
	if l.At.IsZero() {
		l.At = time.Now()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(l)
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	p := &printer{}
	p.say(Line{What: "started"})
	if err := run(ctx, p, os.Args[1:]); err != nil {
		p.say(Line{What: "fault", Text: err.Error()})
		os.Exit(1)
	}
}

func run(ctx context.Context, p *printer, args []string) error {
	if len(args) == 0 {
		args = []string{""}
	}
	var err error
	switch {
	case args[0] == "idle" && len(args) == 1:
	case args[0] == "first" && len(args) == 2:
		err = first(ctx, p, args[1])
	case args[0] == "watch" && len(args) == 2:
		if err = first(ctx, p, args[1]); err == nil {
			watch(ctx, p, args[1])
		}
	case args[0] == "read" && len(args) == 2:
		err = read(p, args[1])
	case args[0] == "thief" && len(args) == 4:
		err = thief(ctx, p, installation{cluster: args[1], ca: args[2]}, args[3])
	case args[0] == "raid" && len(args) > 7:
		return raid(ctx, p, args[1], args[2], installation{args[3], args[4], args[5], args[6]}, args[7:])
	default:
		err = fmt.Errorf("%s", usage)
	}
	if err == nil {
		<-ctx.Done()
	}
	return err
}
