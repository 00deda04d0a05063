package csi

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	registrationv1 "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/meshca/meshca/api/refusal"
)

func TestTheKubeletRegistersTheDriver(t *testing.T) {
	n := newNode(t)
	socket := n.path("kubelet/plugins_registry/csi.meshca.io-reg.sock")
	must(t, os.MkdirAll(filepath.Dir(socket), 0o755))
	stale, err := net.Listen("unix", socket) // of an agent that was killed
	must(t, err)
	unixListener, ok := stale.(*net.UnixListener)
	if !ok {
		t.Fatalf("%T", stale)
	}
	unixListener.SetUnlinkOnClose(false)
	must(t, stale.Close())
	n.start()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	must(t, err)
	defer conn.Close()
	kubelet := registrationv1.NewRegistrationClient(conn)
	info, err := kubelet.GetInfo(t.Context(), &registrationv1.InfoRequest{})
	must(t, err)
	if info.GetType() != "CSIPlugin" || info.GetName() != DriverName || info.GetEndpoint() != n.path("kubelet/plugins/csi.meshca.io/csi.sock") || len(info.GetSupportedVersions()) != 1 || info.GetSupportedVersions()[0] != "1.0.0" {
		t.Errorf("the kubelet is told %v", info)
	}
	notReady := func() string { return strings.Join(n.agent.NotReady(), "\n") }
	if got := notReady(); !strings.Contains(got, "KUBELET_UNREGISTERED") || !strings.Contains(got, "has not called") {
		t.Errorf("before it is registered the agent says %q", got)
	}
	_, err = kubelet.NotifyRegistrationStatus(t.Context(), &registrationv1.RegistrationStatus{Error: "another driver has the name"})
	must(t, err)
	if got := notReady(); !strings.Contains(got, "another driver has the name") {
		t.Errorf("after a failure the agent says %q", got)
	}
	_, err = kubelet.NotifyRegistrationStatus(t.Context(), &registrationv1.RegistrationStatus{PluginRegistered: true})
	must(t, err)
	eventually(t, "the agent is ready", func() bool { return notReady() == "" })
	n.halt()
	if _, err := os.Lstat(socket); err == nil {
		t.Error("the socket stays, and kubelets call nobody")
	}
}

func TestWhatTheDriverIs(t *testing.T) {
	n := newNode(t)
	n.start()
	who, err := csi.NewIdentityClient(n.conn).GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	must(t, err)
	can, err := csi.NewNodeClient(n.conn).NodeGetCapabilities(t.Context(), &csi.NodeGetCapabilitiesRequest{})
	must(t, err)
	where, err := csi.NewNodeClient(n.conn).NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	must(t, err)
	ready, err := csi.NewIdentityClient(n.conn).Probe(t.Context(), &csi.ProbeRequest{})
	must(t, err)
	if who.GetName() != "csi.meshca.io" || who.GetVendorVersion() != "v0-test" || where.GetNodeId() != "node-1" || !ready.GetReady().GetValue() ||
		len(can.GetCapabilities()) != 1 || can.GetCapabilities()[0].GetRpc().GetType() != csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP {
		t.Errorf("%v, %v, %v, %v", who, can, where, ready)
	}
	_, err = csi.NewNodeClient(n.conn).NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a call of a capability that is not there: %v", err)
	}
	_, err = csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: strings.Repeat("x", maxRequestBytes)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request without a bound: %v", err)
	}
}

// TestTheNodesNameIsInTheAgentsToken, where it is not configured.
func TestTheNodesNameIsInTheAgentsToken(t *testing.T) {
	n := newNode(t)
	n.csi.NodeName = ""
	n.start()
	ask := func() string {
		t.Helper()
		where, err := csi.NewNodeClient(n.conn).NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
		must(t, err)
		return where.GetNodeId()
	}
	host, err := os.Hostname()
	must(t, err)
	if got := ask(); got != host {
		t.Errorf("without a name in the token it is %q", got)
	}
	must(t, os.WriteFile(n.path("agent.token"), []byte("x.eyJrdWJlcm5ldGVzLmlvIjp7Im5vZGUiOnsibmFtZSI6IndvcmtlciJ9fX0.x"), 0o600))
	if got := ask(); got != "worker" {
		t.Errorf("it is %q", got)
	}
}

// TestOnlyRootCalls, whatever the modes of files are.
func TestOnlyRootCalls(t *testing.T) {
	n := newNode(t)
	n.start()
	for _, path := range []string{n.dir, n.driver.config.Socket} {
		must(t, os.Chmod(path, 0o777)) // so that the socket's own mode refuses nobody
	}
	for uid, welcome := range map[int]bool{0: true, 65534: false} {
		answered := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its user
			answered <- callAs(uid, n.driver.config.Socket)
		}()
		if err := <-answered; (err == nil) != welcome {
			t.Errorf("uid %d: %v", uid, err)
		}
	}
	eventually(t, "it is told", func() bool { return strings.Contains(n.log.String(), "neither root nor the agent's user") })
}

// callAs connects as a user, this thread alone, and waits for the server's first bytes.
func callAs(uid int, socket string) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
		return errno
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		return err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		return err
	}
	_, _ = unix.Write(fd, []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	got, err := unix.Read(fd, make([]byte, 9))
	if err == nil && got == 0 {
		return io.EOF
	}
	return err
}

func TestASocketThatWasRemovedComesBack(t *testing.T) {
	n := newNode(t)
	n.start()
	must(t, os.RemoveAll(n.path("kubelet/plugins")))
	eventually(t, "it is there again", func() bool {
		_, err := os.Lstat(n.driver.config.Socket)
		return err == nil
	})
	must(t, n.pod("web").publish())
}

func TestAPanicIsOneCallsTrouble(t *testing.T) {
	log := &logBook{}
	g := guard{slog.New(slog.NewTextHandler(log, nil))}
	call := func(h grpc.UnaryHandler) error {
		_, err := g.unary(context.Background(), nil, &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Node/NodePublishVolume"}, h)
		return err
	}
	err := call(func(context.Context, any) (any, error) { panic("a-token-in-a-panic") })
	if status.Code(err) != codes.Internal || refusal.Of(err) != refusal.Internal {
		t.Errorf("the caller hears %v", err)
	}
	err = call(func(context.Context, any) (any, error) { var list []int; return list[len(list)], nil })
	if status.Code(err) != codes.Internal {
		t.Errorf("the caller hears %v", err)
	}
	if text := log.String(); strings.Contains(text, "a-token-in-a-panic") || !strings.Contains(text, "index out of range") || !strings.Contains(text, "NodePublishVolume") {
		t.Errorf("the log has %s", text)
	}
}
