// Up runs a Kubernetes node until it is interrupted. Its programs come from .parts/bin; `make parts` gets them.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/meshca/meshca/test/node"
)

func main() {
	check := flag.Bool("check", false, "tell what the machine lacks for a node, and start none")
	flag.Parse()
	if err := run(*check); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(check bool) error {
	if check {
		if missing := node.Missing(); len(missing) > 0 {
			return fmt.Errorf("a Kubernetes node cannot run here: %s", strings.Join(missing, "; "))
		}
		return nil
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	fmt.Println("starting a Kubernetes node (half a minute at most where all is built)")
	n, err := node.Launch(ctx)
	if err != nil {
		return err
	}
	fmt.Printf(`Ready after %v. In another shell:

  export KUBECONFIG=%s
  .parts/bin/kubectl get pods -A

Logs are in %s. Ctrl-C ends the node and takes all of it away.
`, n.Took.Round(100*time.Millisecond), n.Kubeconfig, n.Logs())
	<-ctx.Done()
	return n.Close()
}
