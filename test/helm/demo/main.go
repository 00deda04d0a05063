// Demo is what `make run-kubernetes` shows: a real Kubernetes node, on which the chart is installed by Helm and the example
// applied by kubectl; who has which identity, and requests over mTLS while the identities rotate.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/meshca/meshca/test/helm"
	"github.com/meshca/meshca/test/node"
)

const (
	ttl       = 20 * time.Second
	rotations = 2
	perSecond = 20
	// patience is for one step, on a machine that has other things to do.
	patience = 5 * time.Minute
)

func main() {
	keep := flag.Bool("keep", false, "leave everything as it is at the end, until Ctrl-C")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the demo at once, and the kernel ends the node
	if err := run(ctx, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo tells what it does, with the time since its start.
type demo struct {
	*helm.Site
	began time.Time
}

func (d *demo) say(what string) {
	fmt.Printf("\n[%5.1fs] %s\n", time.Since(d.began).Seconds(), what)
}

// shows prints a command as a person would type it, and what it printed.
func (d *demo) shows(command string, out string, err error) error {
	fmt.Printf("  $ %s\n", command)
	for line := range strings.Lines(out) {
		fmt.Print("    ", line)
	}
	return err
}

func run(ctx context.Context, keep bool) (err error) {
	d := &demo{began: time.Now()}
	d.say("starting a real Kubernetes node: API server, kubelet, containerd, DNS, Services")
	n, err := node.Launch(ctx)
	if err != nil {
		return err
	}
	defer func() {
		d.say("taking the node away")
		err = errors.Join(err, n.Close())
	}()
	ctx, cancel := context.WithTimeout(ctx, 24*time.Hour)
	defer cancel()
	if d.Site, err = helm.Prepare(ctx, n, d.say); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{d.install, d.example, d.identities, d.rotate} {
		if err := d.within(ctx, step); err != nil {
			return err
		}
	}
	if keep {
		d.say("all of it stays until Ctrl-C. In another shell:\n\n  export KUBECONFIG=" + d.Kubeconfig + "\n  .parts/bin/kubectl get pods -A")
		<-ctx.Done()
		return nil
	}
	return d.within(ctx, d.uninstall)
}

func (d *demo) within(ctx context.Context, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return step(ctx)
}

func (d *demo) install(ctx context.Context) error {
	d.say("helm install meshca deploy/chart/meshca --namespace meshca --create-namespace --set image.registry=" + helm.Registry)
	if err := d.Install(ctx); err != nil {
		return err
	}
	out, err := d.Kubectl(ctx, "--namespace", "meshca", "get", "pods")
	return d.shows("kubectl -n meshca get pods", out, err)
}

func (d *demo) example(ctx context.Context) error {
	d.say("kubectl apply -f deploy/examples")
	text, err := d.Example()
	if err != nil {
		return err
	}
	if err := d.ApplyExample(ctx, text); err != nil {
		return err
	}
	out, err := d.Kubectl(ctx, "--namespace", "demo", "get", "pods")
	if err := d.shows("kubectl -n demo get pods", out, err); err != nil {
		return err
	}
	d.say("the visitor's Envoy asks the greeter's, over mTLS")
	out, err = d.Visit(ctx)
	return d.shows("kubectl get --raw /api/v1/namespaces/demo/services/visitor/proxy/", out, err)
}

func (d *demo) identities(ctx context.Context) error {
	d.say("who has which identity: the CA's word, and the agent's")
	out, err := d.Certctl(ctx, "svid", "list")
	if err := d.shows("kubectl -n meshca exec meshca-0 -- certctl svid list", out, err); err != nil {
		return err
	}
	out, err = d.AgentCertctl(ctx, "--agent", "svid", "list")
	return d.shows("kubectl -n meshca exec daemonset/meshca-agent -- certctl --agent svid list", out, err)
}

// rotate has the SVIDs live for a short while by policy, and watches them rotate under traffic.
func (d *demo) rotate(ctx context.Context) error {
	d.say(fmt.Sprintf("helm upgrade: SVIDs live for %s from now on, by policy; meanwhile %d requests a second", ttl, perSecond))
	if err := d.Send(ctx, "traffic", "visitor", perSecond); err != nil {
		return err
	}
	if err := d.PodReady(ctx, "demo", "traffic"); err != nil {
		return err
	}
	if err := d.Live(ctx, ttl); err != nil {
		return err
	}
	total := 0
	for _, account := range []string{"visitor", "greeter"} {
		n, err := d.follow(ctx, account)
		if err != nil {
			return err
		}
		total += n
	}
	sent, err := d.Sent(ctx, "traffic")
	if err != nil {
		return err
	}
	out, err := d.AgentCertctl(ctx, "--agent", "svid", "list")
	if err := d.shows("kubectl -n meshca exec daemonset/meshca-agent -- certctl --agent svid list", out, err); err != nil {
		return err
	}
	fmt.Printf("\nrequests ok=%d failed=%d rotations=%d\n", sent.OK, sent.Failed, total)
	if sent.Failed > 0 || sent.OK == 0 {
		return fmt.Errorf("%d requests failed, the last one: %s", sent.Failed, sent.Last)
	}
	return nil
}

// follow tells of each certificate that a service account gets, until it has rotated often enough. The first one ends a
// long life.
func (d *demo) follow(ctx context.Context, account string) (int, error) {
	before, err := d.Issued(ctx, account)
	if err != nil {
		return 0, err
	}
	for seen := before; seen < before+rotations; time.Sleep(2 * time.Second) {
		now, err := d.Issued(ctx, account)
		if err != nil {
			return 0, err
		}
		if now == seen {
			continue
		}
		seen = now
		sent, err := d.Sent(ctx, "traffic")
		if err != nil {
			return 0, err
		}
		fmt.Printf("  [%5.1fs] the %s has its certificate number %d; requests ok=%d failed=%d\n", time.Since(d.began).Seconds(), account, seen, sent.OK, sent.Failed)
	}
	return rotations, nil
}

func (d *demo) uninstall(ctx context.Context) error {
	d.say("kubectl delete -f deploy/examples; helm uninstall meshca")
	if _, err := d.Kubectl(ctx, "delete", "namespace", "demo"); err != nil {
		return err
	}
	return d.Uninstall(ctx)
}
