package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/upstream/disk"
)

// running is a CA that serves, and what it logs.
type running struct {
	*daemon
	t   *testing.T
	api string
	ops string
}

// logged is a log that a test reads while it is written.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.b.Write(p) }

// find returns the value of a key in the first line with this message.
func (l *logged) find(msg, key string) (string, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(l.b.Bytes()) {
		var m map[string]any
		if json.Unmarshal(line, &m) == nil && m["msg"] == msg {
			return fmt.Sprint(m[key]), true
		}
	}
	return "", false
}

// run serves a configuration until the test ends.
func run(t *testing.T, c *Config) *running {
	t.Helper()
	out := &logged{}
	ctx, stop := context.WithCancel(context.Background())
	d, err := open(ctx, c, slog.New(slog.NewJSONHandler(out, nil)), io.Discard)
	if err != nil {
		stop()
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- d.runOn(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-ended, d.close()); err != nil {
			t.Errorf("it ended with %v", err)
		}
	})
	r := &running{daemon: d, t: t, api: l.Addr().String()}
	r.until("it serves", func() error {
		var ok bool
		if r.ops, ok = out.find("meshca serves", "ops"); !ok {
			return errors.New("it does not say so")
		}
		return nil
	})
	return r
}

// until waits for what is to happen soon.
func (r *running) until(what string, try func() error) {
	r.t.Helper()
	err := try()
	for began := time.Now(); err != nil; err = try() {
		if time.Since(began) > 20*time.Second {
			r.t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// gets asks the ops listener and wants this code, and this in the body.
func (r *running) gets(path string, code int, want string) error {
	resp, err := http.Get("http://" + r.ops + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != code || !strings.Contains(string(body), want) {
		return fmt.Errorf("%s answers %d %.300q (%v), want %d and %q", path, resp.StatusCode, body, err, code, want)
	}
	return nil
}

// health asks gRPC's health service as an agent that has no SVID yet would.
func (r *running) health(conn *grpc.ClientConn, want healthv1.HealthCheckResponse_ServingStatus) error {
	got, err := healthv1.NewHealthClient(conn).Check(r.t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil || got.Status != want {
		return fmt.Errorf("health is %v (%v), want %v", got.GetStatus(), err, want)
	}
	return nil
}

// TestReadinessIsTold, of a CA as a whole: over HTTP, over gRPC, in the metrics, and when it comes back by itself.
func TestReadinessIsTold(t *testing.T) {
	dir := t.TempDir()
	r := run(t, configIn(t, dir, clusterIn(t, dir, "a", false)))
	r.until("ready", func() error { return r.gets("/readyz", http.StatusOK, "ok") })

	id, err := ca.ServerID(r.config.trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(r.api, grpc.WithTransportCredentials(credentials.NewTLS(
		tlsconfig.TLSClientConfig(bundleSource{r.trust}, tlsconfig.AuthorizeID(id)))))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r.until("serving", func() error { return r.health(conn, healthv1.HealthCheckResponse_SERVING) })
	bundle, _ := r.trust.Bundle()
	sequence, _ := bundle.SequenceNumber()
	for _, metric := range []string{"\nmeshca_ready 1\n", fmt.Sprintf("\nmeshca_bundle_sequence %g\n", float64(sequence)), "\nmeshca_ledger_commit_seconds_count", "\nmeshca_cluster_ready{cluster=\"a\"} 1\n"} {
		if err := r.gets("/metrics", http.StatusOK, metric); err != nil {
			t.Error(err)
		}
	}

	r.metrics.commit(1, time.Millisecond, refusal.New(refusal.StoreUnavailable, "the disk is full"))
	if err := r.gets("/readyz", http.StatusServiceUnavailable, "the disk is full"); err != nil {
		t.Error(err)
	}
	r.until("not serving", func() error { return r.health(conn, healthv1.HealthCheckResponse_NOT_SERVING) })
	r.until("ready again, though nobody asked for anything", func() error { return r.gets("/readyz", http.StatusOK, "ok") })
	r.until("serving again", func() error { return r.health(conn, healthv1.HealthCheckResponse_SERVING) })
}

// TestExtraAnchorsReachTheBundle, and the file that agents read; what is no longer named stays.
func TestExtraAnchorsReachTheBundle(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	c.BundleFile = filepath.Join(dir, "bundle.json")
	var anchors []*x509.Certificate
	for _, name := range []string{"old", "new"} {
		files := disk.Files{Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
		root, err := disk.Create(files, disk.CreateOptions{TrustDomain: c.trustDomain, CommonName: name})
		if err != nil {
			t.Fatal(err)
		}
		anchors = append(anchors, root)
		c.Upstream.Disk.ExtraAnchors = append(c.Upstream.Disk.ExtraAnchors, files.Cert)
	}
	check := func(t *testing.T) {
		r := run(t, c)
		r.until("the bundle file", func() error {
			b, err := spiffebundle.Load(c.trustDomain, c.BundleFile)
			if err != nil {
				return err
			}
			if n := len(b.X509Authorities()); n != 3 || !b.HasX509Authority(anchors[0]) || !b.HasX509Authority(anchors[1]) {
				return fmt.Errorf("it holds %d roots of 3", n)
			}
			return nil
		})
	}
	t.Run("named", check)
	c.Upstream.Disk.ExtraAnchors = nil
	if err := os.Remove(c.BundleFile); err != nil {
		t.Fatal(err)
	}
	t.Run("no longer named", check)
	c.Upstream.Disk.ExtraAnchors = []string{filepath.Join(dir, "absent.crt")}
	if _, err := open(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard); err == nil || !strings.Contains(err.Error(), "extraAnchors: "+dir) {
		t.Errorf("an anchor that is not there: %v", err)
	}
}

// TestHangupOpensTheAuditLogAnew, as logrotate asks for it.
func TestHangupOpensTheAuditLogAnew(t *testing.T) {
	dir := t.TempDir()
	c := configIn(t, dir, clusterIn(t, dir, "a", false))
	r := run(t, c)
	decide := func() {
		r.journal.Refused(registration.EventCall, "grpc", registration.Caller{}, "a", refusal.New(refusal.Overloaded, "busy"))
	}
	lines := func(file string) int {
		data, _ := os.ReadFile(file)
		return bytes.Count(data, []byte("\n"))
	}
	path, moved := c.Audit.File, c.Audit.File+".1"
	decide()
	if err := os.Rename(path, moved); err != nil {
		t.Fatal(err)
	}
	decide()
	if n := lines(moved); n != 2 {
		t.Fatalf("before the signal %d lines are in the old file, want 2", n)
	}
	alive := make(chan os.Signal, 1)
	signal.Notify(alive, syscall.SIGHUP)
	defer signal.Stop(alive)
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	<-alive // a signal that was still on its way when the CA has closed would end this process
	r.until("lines go to a new file", func() error {
		if decide(); lines(path) == 0 {
			return errors.New("they do not")
		}
		return nil
	})
	old, now := lines(moved), lines(path)
	decide()
	if lines(moved) != old || lines(path) != now+1 {
		t.Errorf("a line did not go to the new file alone: %d and %d lines, then %d and %d", old, now, lines(moved), lines(path))
	}
}

// TestAClusterThatCannotBeOpened keeps the CA from its start, and is told by its name, its file, and what to do.
func TestAClusterThatCannotBeOpened(t *testing.T) {
	dir := t.TempDir()
	junk, noCA, absent := filepath.Join(dir, "junk"), filepath.Join(dir, "noca"), filepath.Join(dir, "absent")
	const kubeconfig = `{clusters: [{name: b, cluster: {server: "https://b.test", certificate-authority-data: aGVsbG8=}}],
		contexts: [{name: b, context: {cluster: b}}], current-context: b}`
	for file, text := range map[string]string{junk: "{", noCA: kubeconfig} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := configIn(t, dir, clusterIn(t, dir, "a", false), clusterIn(t, dir, "b", false))
	b := &c.Clusters[1]
	url := func(caFile string) func() {
		return func() { b.Keys = kubernetes.KeysConfig{URL: "https://b.test/keys", CAFile: caFile} }
	}
	review := func(kubeconfig string) func() {
		return func() { b.Config = kubernetes.Config{Name: "b", Kubeconfig: kubeconfig} }
	}
	for name, tt := range map[string]struct {
		edit func()
		want string
	}{
		"a kubeconfig that is not there":    {review(absent), absent},
		"a kubeconfig that is none":         {review(junk), junk},
		"a kubeconfig without a CA in it":   {review(noCA), noCA},
		"no kubeconfig outside of any pod":  {review(""), "name a kubeconfig file"},
		"a CA file that is not there":       {url(absent), absent},
		"a CA file without any certificate": {url(junk), junk},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("KUBERNETES_SERVICE_HOST", "")
			good := *b
			defer func() { *b = good }()
			tt.edit()
			if err := c.complete(); err != nil {
				t.Fatal(err)
			}
			_, err := open(t.Context(), c, slog.New(slog.DiscardHandler), io.Discard)
			if err == nil {
				t.Fatal("the CA was opened")
			}
			for _, want := range []string{"cluster b: ", tt.want, "Put that right, or take the cluster out"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want %q", err, want)
				}
			}
		})
	}
}
