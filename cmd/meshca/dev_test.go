package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// meshcaDev runs `meshca dev` with these arguments until ctx ends.
func meshcaDev(ctx context.Context, args ...string) error {
	c := command()
	c.SetArgs(append([]string{"dev"}, args...))
	c.SetOut(io.Discard)
	c.SetErr(io.Discard)
	return c.ExecuteContext(ctx)
}

func TestDevRefusesWrongUsage(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, c := range map[string]struct{ args, want string }{
		"no workload":    {"", "--workload"},
		"no flag before": {"--workload shop/cart shop/till", `"shop/till" is no flag`},
		"no slash":       {"--workload cart", "namespace/service-account"},
		"no life":        {"--workload shop/cart --svid-ttl 0s", "--svid-ttl 0s is no life"},
		"less than none": {"--workload shop/cart --svid-ttl -1h", "--svid-ttl -1h0m0s is no life"},
		"too short":      {"--workload shop/cart --svid-ttl 1s", "svid.ttl"},
		"no such flag":   {"--workloads shop/cart", "--help"},
		"no upstream":    {"--workload shop/cart --upstream " + filepath.Join(state, "absent.yaml"), "--upstream: " + filepath.Join(state, "absent.yaml") + " does not exist"},
		"too much":       {"--workload shop/cart --upstream " + file("much.yaml", "trustDomain: x\nupstream: {disk: {}}\n"), "`upstream:` and nothing else"},
		"two upstreams":  {"--workload shop/cart --upstream " + file("two.yaml", "upstream: {disk: {}, vault: {}}\n"), "both disk and vault"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			err := meshcaDev(ctx, append(strings.Fields(c.args), "--state", state)...)
			var usage usageError
			if !errors.As(err, &usage) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want wrong usage that says %q", err, c.want)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(state, "root.key")); err == nil {
		t.Error("a root was made for nothing")
	}
}

// Whatever is wrong with a command line is wrong usage, for every command.
func TestWrongUsageIsTyped(t *testing.T) {
	for _, line := range []string{
		"server", "serve", "serve x --config y", "serve --wat", "config chek y", "config check", "root make", "root create", "root import x --config y", "root import --cert y --key z", "version x",
	} {
		c := command()
		c.SetArgs(strings.Fields(line))
		c.SetOut(io.Discard)
		c.SetErr(io.Discard)
		var usage usageError
		if err := c.ExecuteContext(t.Context()); !errors.As(err, &usage) {
			t.Errorf("meshca %s: got %v, want wrong usage", line, err)
		}
	}
}

// A workload may have the agent's own service account, and its namespace the name of anything that dev keeps.
func TestDevKeepsWhatIsTheAgentsApart(t *testing.T) {
	state, err := os.MkdirTemp("", "dev") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(state) })
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- meshcaDev(ctx, "--state", state, "--workload", "meshca/meshca-agent", "--workload", "agent/keys", "--workload", "tokens/x",
			"--listen", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--agent-ops", "127.0.0.1:0")
	}()
	socket := devState{state}.agentAdmin()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := allFresh(ctx, socket, 3)
		if err == nil {
			break
		}
		select {
		case err := <-ended:
			t.Fatalf("it ended: %v", err)
		default:
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// allFresh asks an agent whether it and so many workloads have their SVIDs.
func allFresh(ctx context.Context, socket string, workloads int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := client.Open(ctx, socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	status, err := conn.Agent.GetAgentStatus(ctx, &meshcav1.GetAgentStatusRequest{})
	if err != nil {
		return err
	}
	fresh := 0
	for _, w := range status.GetWorkloads() {
		if w.GetState() == "fresh" {
			fresh++
		}
	}
	if fresh != workloads || status.GetSelf() == nil {
		return fmt.Errorf("%d of %d workloads are fresh: %v", fresh, workloads, status)
	}
	return nil
}
