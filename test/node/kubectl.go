package node

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Kubectl runs kubectl as the administrator, and returns what it printed.
func (n *Node) Kubectl(ctx context.Context, args ...string) (string, error) {
	return n.client(ctx, "kubectl", "", args...)
}

// Apply creates or changes the objects of a manifest.
func (n *Node) Apply(ctx context.Context, manifest string) error {
	_, err := n.client(ctx, "kubectl", manifest, "apply", "-f", "-")
	return err
}

// Delete deletes the objects of a manifest, and returns when they are gone.
func (n *Node) Delete(ctx context.Context, manifest string) error {
	_, err := n.client(ctx, "kubectl", manifest, "delete", "--ignore-not-found", "-f", "-")
	return err
}

// Exec runs a command in a pod's first container, and returns what it printed.
func (n *Node) Exec(ctx context.Context, namespace, pod string, command ...string) (string, error) {
	return n.Kubectl(ctx, append([]string{"exec", "--namespace", namespace, pod, "--"}, command...)...)
}

// PodLogs is what a pod's first container has printed.
func (n *Node) PodLogs(ctx context.Context, namespace, pod string) (string, error) {
	return n.Kubectl(ctx, "logs", "--namespace", namespace, pod)
}

// PodReady waits until a pod is Ready; where ctx ends first, the error holds its events.
func (n *Node) PodReady(ctx context.Context, namespace, pod string) error {
	return n.waitFor(ctx, namespace, pod, "--for=condition=Ready")
}

// PodDone waits until a pod has ended well.
func (n *Node) PodDone(ctx context.Context, namespace, pod string) error {
	return n.waitFor(ctx, namespace, pod, "--for=jsonpath={.status.phase}=Succeeded")
}

func (n *Node) waitFor(ctx context.Context, namespace, pod, condition string) error {
	patience := time.Minute
	if deadline, ok := ctx.Deadline(); ok {
		patience = time.Until(deadline)
	}
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err := n.Kubectl(wait, "wait", "--namespace", namespace, "pod/"+pod, condition, "--timeout="+patience.String())
	if err == nil {
		return nil
	}
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	events, _ := n.Kubectl(after, "events", "--namespace", namespace, "--for=pod/"+pod)
	return fmt.Errorf("pod %s/%s: %w\n%s", namespace, pod, err, events)
}

// Helm runs Helm as the administrator, without any configuration of the user's.
func (n *Node) Helm(ctx context.Context, args ...string) (string, error) {
	return n.client(ctx, "helm", "", args...)
}

// client runs a program that reads KUBECONFIG, and keeps what it keeps in the node's folder.
func (n *Node) client(ctx context.Context, program, input string, args ...string) (string, error) {
	path, err := n.tool(program)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = 2 * time.Second
	cmd.Stdin = strings.NewReader(input)
	cmd.Env = n.Environ()
	return output(cmd)
}

// Environ is the environment of a shell of the administrator's: kubectl and helm are on its PATH, and reach this node.
func (n *Node) Environ() []string {
	home := filepath.Join(n.place.dir, "home")
	helm := filepath.Join(home, "helm")
	env := append(os.Environ(), "KUBECONFIG="+n.Kubeconfig, "HOME="+home, "KUBECACHEDIR="+filepath.Join(home, "kube"),
		"HELM_CACHE_HOME="+helm, "HELM_CONFIG_HOME="+helm, "HELM_DATA_HOME="+helm)
	if bin, err := binaries(); err == nil { // it was there when the node was started
		env = append(env, "PATH="+bin+":"+os.Getenv("PATH"))
	}
	return env
}

// Inside runs a command in the node's namespaces, as a root shell on the node would.
func (n *Node) Inside(ctx context.Context, command ...string) (string, error) {
	nsenter, err := lookPath("nsenter")
	if err != nil {
		return "", err
	}
	args := []string{"--target", strconv.Itoa(n.process.PID()), "--mount", "--net", "--pid", "--cgroup", "--wd=/", "--"}
	cmd := exec.CommandContext(ctx, nsenter, append(args, command...)...)
	cmd.WaitDelay = 2 * time.Second
	cmd.Env = append(os.Environ(), "PATH="+searchPath())
	return output(cmd)
}

// output runs a command and returns its standard output; an error holds both.
func output(cmd *exec.Cmd) (string, error) {
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s%s", filepath.Base(cmd.Path), strings.Join(cmd.Args[1:], " "), err, out.String(), problems.String())
	}
	return out.String(), nil
}

// Await asks every 50 ms until condition returns nil; where ctx or the node ends first, the error holds its last answer.
func (n *Node) Await(ctx context.Context, what string, condition func(context.Context) error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := condition(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, err)
		case <-n.process.Done():
			return fmt.Errorf("waiting for %s: the node ended: %s", what, n.process.Output())
		case <-tick.C:
		}
	}
}
