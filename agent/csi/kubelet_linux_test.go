package csi

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/test/fakeca"
)

// node is a node with an agent, seen from its kubelet.
type node struct {
	t      *testing.T
	dir    string
	ca     *fakeca.CA
	log    *logBook
	csi    Config
	config agent.Config
	label  func(path string) error // nil: the driver's own
	boot   *string                 // nil: the machine's own

	agent  *agent.Agent
	driver *Driver
	stop   func() error
	conn   *grpc.ClientConn
}

// logBook keeps what is logged.
type logBook struct {
	mu   sync.Mutex
	text []byte
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text = append(b.text, p...)
	return len(p), nil
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.text)
}

// newNode has a CA that runs, and an agent that does not yet.
func newNode(t *testing.T) *node {
	t.Helper()
	needMounts(t)
	ca, err := fakeca.New("mesh.test")
	must(t, err)
	address, err := ca.Start()
	must(t, err)
	dir, err := os.MkdirTemp("", "cs") // short: sockets lie in it
	must(t, err)
	n := &node{t: t, dir: dir, ca: ca, log: &logBook{}}
	t.Cleanup(func() {
		ca.Stop()
		if t.Failed() {
			t.Log(n.log)
		}
		all, _ := mounts()
		for _, m := range all {
			if within(dir, m.at) {
				_ = unmount(m.at)
			}
		}
		must(t, os.RemoveAll(dir))
	})
	ca.Agent("agent-token", "node-1")
	must(t, os.WriteFile(n.path("agent.token"), []byte("agent-token"), 0o600))
	must(t, os.WriteFile(n.path("bundle.json"), ca.Bundle(), 0o600))
	log := slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	n.csi = Config{Version: "v0-test", Dir: n.path("run/pods"), KubeletDir: n.path("kubelet"), NodeName: "node-1", Log: log}
	n.config = agent.Config{
		TrustDomain: ca.Domain(), Cluster: "test", Server: address, TokenFile: n.path("agent.token"), BundleFile: n.path("bundle.json"),
		RuntimeDir: n.path("run"), StateDir: n.path("state"), Version: "v0-test", Log: log,
	}
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

// start runs the agent until the test ends or halt is called.
func (n *node) start() {
	n.t.Helper()
	var err error
	n.driver, err = New(n.csi)
	must(n.t, err)
	if n.label != nil {
		n.driver.label = n.label
	}
	if n.boot != nil {
		n.driver.boot = *n.boot
	}
	config := n.config
	config.Sources = []agent.Source{n.driver}
	n.agent, err = agent.New(config)
	must(n.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func(a *agent.Agent) { done <- a.Run(ctx) }(n.agent)
	n.conn, err = grpc.NewClient("unix:"+n.driver.config.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	must(n.t, err)
	conn := n.conn
	n.stop = sync.OnceValue(func() error {
		cancel()
		_ = conn.Close()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return fmt.Errorf("the agent does not stop")
		}
	})
	eventually(n.t, "the driver listens", func() bool { // a client that finds nobody looks again after a second only
		c, err := net.Dial("unix", n.driver.config.Socket)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	stop := n.stop
	n.t.Cleanup(func() { must(n.t, stop()) })
}

// refuse has the CA refuse a pod for a reason.
func (n *node) refuse(p *made, why error) {
	n.ca.Refuse(func(id spiffeid.ID) error {
		if id.String() == p.id {
			return why
		}
		return nil
	})
}

// halt ends the agent.
func (n *node) halt() {
	n.t.Helper()
	must(n.t, n.stop())
}

// made is a pod with one volume, and its kubelet's directory for that.
type made struct {
	n          *node
	name, uid  string
	id         string // of its service account
	attributes map[string]string
	group      string
	readonly   bool
	token      string
	target     string
	volume     string
}

// pod has a kubelet begin with a pod.
func (n *node) pod(name string) *made {
	n.t.Helper()
	uid := "uid-of-" + name
	target := n.path("kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/identity/mount")
	must(n.t, os.MkdirAll(filepath.Dir(target), 0o750))
	p := &made{n: n, name: name, uid: uid, target: target, readonly: true, volume: "csi-" + keyOf(uid) + keyOf(name), attributes: map[string]string{}}
	p.id = p.freshToken(1)
	return p
}

// freshToken gives the pod another token of its own.
func (p *made) freshToken(serial int) (id string) {
	p.token = tokenFor(p.name, p.uid, serial)
	return p.n.ca.Workload(p.token, "/ns/shop/sa/"+p.name).String()
}

// tokenFor has the form of a service-account token, and nobody's signature.
func tokenFor(name, podUID string, serial int) string {
	claims := fmt.Sprintf(`{"aud":["meshca"],"exp":%d,"jti":"%d","sub":"system:serviceaccount:shop:%s","kubernetes.io":{"pod":{"name":%q,"uid":%q}}}`,
		time.Now().Add(time.Hour).Unix(), serial, name, name, podUID)
	part := base64.RawURLEncoding.EncodeToString
	return part([]byte(`{"alg":"RS256"}`)) + "." + part([]byte(claims)) + "." + part([]byte("secret-signature-"+strconv.Itoa(serial)))
}

// tokens is how kubelets pass tokens.
func tokens(audience, token string) string {
	data, err := json.Marshal(map[string]any{
		audience:    map[string]string{"token": token, "expirationTimestamp": time.Now().Add(time.Hour).Format(time.RFC3339)},
		"elsewhere": map[string]string{"token": "another-audience", "expirationTimestamp": "2030-01-01T00:00:00Z"},
	})
	if err != nil {
		panic(err)
	}
	return string(data)
}

func (p *made) request() *csi.NodePublishVolumeRequest {
	attributes := map[string]string{
		keyEphemeral: "true", keyPodName: p.name, keyPodNamespace: "shop", keyPodUID: p.uid, keyServiceAccount: p.name,
		keyTokens: tokens(Audience, p.token),
	}
	maps.Copy(attributes, p.attributes)
	return &csi.NodePublishVolumeRequest{
		VolumeId: p.volume, TargetPath: p.target, Readonly: p.readonly, VolumeContext: attributes,
		VolumeCapability: &csi.VolumeCapability{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{VolumeMountGroup: p.group}},
		},
	}
}

// publish is NodePublishVolume as a kubelet calls it.
func (p *made) publish() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := csi.NewNodeClient(p.n.conn).NodePublishVolume(ctx, p.request())
	return err
}

func (p *made) unpublish() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := csi.NewNodeClient(p.n.conn).NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: p.volume, TargetPath: p.target})
	return err
}

// dir is the volume's directory on the node.
func (p *made) dir() string { return filepath.Join(p.n.csi.Dir, keyOf(p.volume)) }

// sees is what a proxy in the pod gets under its own name: the identity's certificate, empty where there is none.
func (p *made) sees() string {
	p.n.t.Helper()
	conn, err := grpc.NewClient("unix:"+filepath.Join(p.target, "socket"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(p.n.t, err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	answer, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(ctx, &discoveryv3.DiscoveryRequest{
		Node: &corev3.Node{Id: "test"}, ResourceNames: []string{p.id}, TypeUrl: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
	}, grpc.WaitForReady(true))
	if err != nil {
		p.n.t.Logf("the pod %s asks: %v", p.name, err)
		return ""
	}
	for _, r := range answer.GetResources() {
		s := &tlsv3.Secret{}
		must(p.n.t, r.UnmarshalTo(s))
		return string(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	}
	return ""
}

// left is what there is of the pod's volume on the node.
func (p *made) left() (things []string) {
	for _, path := range []string{p.dir(), p.target} {
		if _, err := os.Lstat(path); err == nil {
			things = append(things, path)
		}
	}
	all, err := mounts()
	must(p.n.t, err)
	for _, m := range all {
		if m.at == p.target || within(p.dir(), m.at) {
			things = append(things, "the mount at "+m.at)
		}
	}
	return things
}

// kept is what the agent keeps of keys.
func (n *node) kept() int {
	list, err := filepath.Glob(filepath.Join(n.config.RuntimeDir, "keys/svid-*"))
	must(n.t, err)
	return len(list)
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came to be that %s", what)
		}
	}
}
