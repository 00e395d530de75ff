/* The two programs of benchmarks/transport.py over librabbitmq, the broker's C client: what a message's way costs
 * without Python. Classic queues, no confirms, an acknowledgement a message.
 *
 *   rabbitmq_c ask|answer HOST PORT USER PASSWORD VHOST OUTBOX INBOX BYTES TRIPS ROW
 *
 * `ask` prints the median seconds of a round trip and the bytes a second in one direction. As a shared library it
 * gives benchmarks/by_hand.py the functions that are not static.
 */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void die(const char *what) {
    fprintf(stderr, "rabbitmq_c: %s\n", what);
    exit(1);
}

static void check(amqp_connection_state_t connection, const char *what) {
    if (amqp_get_rpc_reply(connection).reply_type != AMQP_RESPONSE_NORMAL) die(what);
}

static double now(void) {
    struct timespec moment;
    clock_gettime(CLOCK_MONOTONIC, &moment);
    return moment.tv_sec + moment.tv_nsec / 1e9;
}

static void declare(amqp_connection_state_t connection, const char *queue) {
    amqp_queue_declare(connection, 1, amqp_cstring_bytes(queue), 0, 1, 0, 0, amqp_empty_table);
    check(connection, "queue.declare");
}

amqp_connection_state_t connect_to(
    const char *host, const char *port, const char *user, const char *password, const char *vhost, const char *outbox,
    const char *inbox
) {
    amqp_connection_state_t connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    if (!socket || amqp_socket_open(socket, host, atoi(port))) die("no connection");
    amqp_login(connection, vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, user, password);
    amqp_channel_open(connection, 1);
    check(connection, "login");
    declare(connection, outbox);
    declare(connection, inbox);
    amqp_basic_qos(connection, 1, 0, 100, 0);
    amqp_basic_consume(connection, 1, amqp_cstring_bytes(inbox), amqp_empty_bytes, 0, 0, 0, amqp_empty_table);
    check(connection, "basic.consume");
    return connection;
}

static void publish(amqp_connection_state_t connection, const char *queue, amqp_bytes_t body) {
    if (amqp_basic_publish(connection, 1, amqp_empty_bytes, amqp_cstring_bytes(queue), 0, 0, NULL, body)) die("publish");
}

static void take(amqp_connection_state_t connection, amqp_envelope_t *envelope) {
    amqp_maybe_release_buffers(connection);
    if (amqp_consume_message(connection, envelope, NULL, 0).reply_type != AMQP_RESPONSE_NORMAL) die("consume");
    if (amqp_basic_ack(connection, 1, envelope->delivery_tag, 0)) die("ack");
}

static void receive(amqp_connection_state_t connection) {
    amqp_envelope_t envelope;
    take(connection, &envelope);
    amqp_destroy_envelope(&envelope);
}

void send_numbers(amqp_connection_state_t connection, const char *queue, void *numbers, size_t size) {
    amqp_bytes_t body = {size, numbers};
    publish(connection, queue, body);
}

void receive_numbers(amqp_connection_state_t connection, void *numbers, size_t size) {
    amqp_envelope_t envelope;
    take(connection, &envelope);
    if (envelope.message.body.len != size) die("a message of another size");
    memcpy(numbers, envelope.message.body.bytes, size);
    amqp_destroy_envelope(&envelope);
}

void disconnect(amqp_connection_state_t connection) {
    amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
    amqp_destroy_connection(connection);
}

static int ascending(const void *one, const void *other) {
    double difference = *(const double *)one - *(const double *)other;
    return (difference > 0) - (difference < 0);
}

static void ask(amqp_connection_state_t connection, const char *outbox, size_t size, int trips, int row) {
    amqp_bytes_t body = amqp_bytes_malloc(size);
    memset(body.bytes, 0, size);
    double *seconds = malloc(trips * sizeof(double));
    for (int trip = 0; trip < trips; trip++) {
        double began = now();
        publish(connection, outbox, body);
        receive(connection);
        seconds[trip] = now() - began;
    }
    double began = now();
    for (int number = 0; number < row; number++) publish(connection, outbox, body);
    receive(connection);
    double rate = (double)row * size / (now() - began);
    int skipped = trips / 4;
    qsort(seconds + skipped, trips - skipped, sizeof(double), ascending);
    printf("%.9f %.1f\n", seconds[skipped + (trips - skipped) / 2], rate);
}

static void answer(amqp_connection_state_t connection, const char *outbox, int trips, int row) {
    amqp_envelope_t envelope;
    for (int trip = 0; trip < trips; trip++) {
        take(connection, &envelope);
        publish(connection, outbox, envelope.message.body);
        amqp_destroy_envelope(&envelope);
    }
    for (int number = 0; number < row; number++) {
        take(connection, &envelope);
        if (number == row - 1) publish(connection, outbox, envelope.message.body);
        amqp_destroy_envelope(&envelope);
    }
}

int main(int count, char **given) {
    if (count != 12) die("eleven arguments, as at the top of rabbitmq_c.c");
    const char *outbox = given[7], *inbox = given[8];
    size_t size = strtoul(given[9], NULL, 10);
    int trips = atoi(given[10]), row = atoi(given[11]);
    amqp_connection_state_t connection =
        connect_to(given[2], given[3], given[4], given[5], given[6], outbox, inbox);
    if (strcmp(given[1], "ask") == 0) ask(connection, outbox, size, trips, row);
    else answer(connection, outbox, trips, row);
    disconnect(connection);
    return 0;
}
